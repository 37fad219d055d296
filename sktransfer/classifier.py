"""FineTunedImageClassifier: the boundary moves toward the input, stage by stage."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer.data.images import Images
from sktransfer.data.labels import (
    EncodedLabels,
    check_labels,
    check_not_missing,
    check_one_per_image,
)
from sktransfer.embedding.image_module import ImageModule
from sktransfer.finetuning.estimator import FineTunedEstimator
from sktransfer.finetuning.fit_data import FitData
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.utils.errors import check_choice
from sktransfer.utils.progress import CallbackSupport, with_callbacks


class FineTunedImageClassifier(CallbackSupport, ClassifierMixin, FineTunedEstimator):
    """Classify images by fine-tuning a pretrained network, stage by stage from the head on.

    Stage 0 fits a new head on cached embeddings. Each later stage moves the boundary toward the
    input: the blocks after it are trained on cached activations of the images and of their
    augmented views, and the blocks before it are not changed, not even by a bit.

    Parameters
    ----------
    backbone : str, torch.nn.Module, callable or classifier, default="efficientnet_lite0"
        A name from `list_backbones`, `"timm:NAME"` if timm is installed, your own module (it is
        copied and not modified), a callable that returns a module, or a fitted
        `FineTunedImageClassifier`. Wrap a fitted classifier in a `sklearn.frozen.FrozenEstimator`
        if scikit-learn will clone the new one, as a search does.
    weights : str, path, torchvision weights or None, default="default"
        `"default"`, a torchvision name such as `"IMAGENET1K_V2"` or its member
        `ResNet50_Weights.IMAGENET1K_V2`, a `.safetensors` or `.pth` file, or `None` for random
        values. With `None`, all trained blocks learn at `lr`, and their
        BatchNorm statistics are learned too.
    unfreeze : "auto", int, str or sequence, default="auto"
        What each stage trains in addition to the head: a number of blocks counted from the head,
        `"all"`, the name of a block or a list of names. 0, which can only come first, fits the head
        (a logistic regression); in a fit without it the head starts at zero. `("all",)` is full
        fine-tuning from the start, and with `weights=None` training from scratch. `"auto"` fits the
        head and then tunes the last blocks, with half of the network's parameters; or all blocks if
        the images differ from the pretraining images, as digits and drawn letters do. `decision_`
        says which, and `recommend_strategy` explains it.
    max_epochs : int or "auto", default="auto"
        Maximum number of epochs of each stage. An epoch shows each image once, in one of its views.
        `"auto"` is 10 if a stage trains all blocks; otherwise 6, or 12 with fewer than 200 images.
    lr : float or "auto", default="auto"
        Highest learning rate of the head, above 0 and at most 10. Within a stage, all learning
        rates rise for a tenth of the epochs and then fall along a half cosine. `"auto"` is 0.003,
        or 0.001 with fewer than 200 images, unless a stage trains all blocks.
    lr_drop : float, default=10.0
        Learning rate of the head divided by that of the last block. Values below 10 cause a
        warning.
    lr_decay : float, default=1.0
        Learning rate of each block divided by that of the block before it. The first trained block
        learns at most 10 times slower than the last. Source: Howard and Ruder, "Universal Language
        Model Fine-tuning for Text Classification", 2018.
    optimizer : {"adam", "sgd"} or torch.optim.Optimizer class, default="adam"
        `"adam"` uses decoupled weight decay, and `"sgd"` uses a Nesterov momentum of 0.9.
    weight_decay : float or "auto", default="auto"
        `"auto"` is 0.01, or 0.1 if some class has fewer than 10 training images.
    batch_size : int, default=8
        Maximum number of images per training step. If BatchNorm learns statistics, a last
        image that would be alone in a batch joins another batch; 1 is then too few.
    batch_norm : {"frozen", "adapt", "train"}, default="frozen"
        BatchNorm statistics: those of the weights; estimated on the images passed to `fit`
        (AdaBN); or learned, in the trained blocks only. If `sample_domain` separates two domains,
        `"adapt"` trains as `"frozen"` does, and then computes statistics with which each layer gets
        similar inputs from the target and from the source. Weights of blocks before the boundary
        never change.
    augment : {"auto", "light", "standard", "aggressive", "industrial"}, callable or None, \
default="auto"
        How augmented views of the training images are made; see `AugmentationDisplay`. `"light"`
        does not mirror images, for digits and text. `"auto"` is `"light"` if the images differ from
        the pretraining images, and otherwise `"standard"`. A torchvision transform or any other
        callable maps an image (3, H, W), uint8, to another one.
    n_views : int, "auto" or None, default="auto"
        Number of augmented views of each training image, cached in addition to the image itself.
        `"auto"` is 3; 1 with `augment="standard"`; and 7 with `augment="industrial"`, which has
        more kinds of distortion. In each epoch, the cached feature maps are also cropped at random,
        and mirrored if the policy mirrors images. `None` makes new views in every epoch, which runs
        all images through the whole network each time.
    dropout : float, default=0.2
        Share of the penultimate vector that is dropped in training.
    label_smoothing : float, default=0.0
        Share of each label that is spread over all classes.
    mixup : float, default=0.0
        Parameter of the Beta distribution from which the mixing ratio of two images is drawn; they
        are mixed at the boundary. 0 does not mix.
    averaging : float or "auto", default="auto"
        Share of the tuned weights in their average with the weights before tuning, 0 to 1; 1 keeps
        the tuned weights. `"auto"` chooses it by the log loss of held-out images, together with a
        temperature that calibrates the probabilities. These are the validation images; without any,
        they are half of the training images (a quarter of fewer than 200), after another training
        on the others. With fewer than 10 held-out images, or at least 2,000 training images and
        none held out, it is 0.75. If a stage trains all blocks, it is 1 in these cases, and with
        more than 300 training images and none held out. Not used with `domain_adversarial`, or if
        no head is fitted first. Source: Wortsman et al., "Robust fine-tuning of zero-shot models",
        CVPR 2022.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, as in scikit-learn.
    validation_fraction : float, default=0.1
        Share of the images of each class that is held out to choose the head's regularization
        and the best epoch. Not used if `X_val` is given, or without `early_stopping`.
    early_stopping : bool or "auto", default="auto"
        `True` ends a stage if the loss on the validation images has not improved for
        `n_iter_no_change` epochs, and restores the best weights, which may be those at the start of
        the stage. `False` trains on all images for `max_epochs` epochs, and chooses the head's
        regularization on `X_val`, or by cross-validation without it. `"auto"` is `True` if
        validation images are given or there are at least 2,000 images; with fewer, all are needed
        for training. With `domain_adversarial`, `"auto"` is `True` only if validation images are
        given: images of the source do not measure the accuracy on the target.
    n_iter_no_change : int, default=5
        Number of epochs without improvement after which a stage ends.
    checkpoint_dir : path or None, default=None
        Folder in which the state of the fit is saved after every epoch. The same fit on the same
        data resumes from it, with the same result as without an interruption. Each fit has its own
        file. `None` saves nothing.
    domain_adversarial : float, default=0.0
        Weight of the loss of an adversary that classifies the domain of each image, while the
        trained blocks learn to make the domains indistinguishable (DANN). It is for labels in a
        source and none in a target, which `sample_domain` in `fit` separates. 0 trains on the
        source only. Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR
        2016.
    image_size : int, (int, int), "auto" or None, default="auto"
        As in `PretrainedFeatureExtractor`, but with another default.
    image_shape, pixel_range, background, device, engine, precision, n_jobs, cache
        As in `PretrainedFeatureExtractor`.
    on_error : {"raise", "skip"}, default="raise"
        What to do with images in `X` or `X_val` that cannot be read. `"raise"` raises one
        `ImageError` that names all of them. With `"skip"`, `fit` trains on the others exactly as if
        it had got only these, adds the broken ones to `errors_`, and warns; it raises an error if
        no image of a class is left. `predict_proba`, `decision_function` and `transform` return
        rows of NaN for broken images and warn, as `PretrainedFeatureExtractor` does with
        `on_error="nan"`. `score` leaves them out and warns. `predict` raises the `ImageError`,
        because there is no label for them.
    callbacks : list of skorch callbacks or None, default=None
        Called in every stage that trains blocks.
    random_state : int, RandomState or None, default=None
        Seed of the validation split, order, dropout and mixup. The cached views of an image do not
        depend on it, so folds and candidates share them.
    verbose : int, default=0
        If not 0, show a progress bar for each stage, and one for images while 64 or more are
        embedded, except inside a search or a cross-validation. scikit-learn callbacks
        (`set_callbacks`) are called for stages and epochs too.

    Attributes
    ----------
    classes_ : ndarray of shape (K,)
        The labels, sorted.
    decision_ : FitDecision
        Values used for `unfreeze`, `augment`, `max_epochs` and `lr` if they were `"auto"`, and why.
        A fit with `decision_.parameters` given gives the same result.
    averaging_ : float
        Share of the tuned weights; 0 if tuning did not help on held-out images.
    temperature_ : float
        Temperature by which the logits were divided; it is part of the head's weights.
    stages_ : list of dict
        One dict per stage: trained blocks, boundary, number of trained parameters, number of
        epochs, the best epoch, its loss and accuracy on the validation images, seconds, and the
        head's `C`.
    errors_ : list of ImageError
        The broken images that `fit` left out with `on_error="skip"`, by row of `X`, each with its
        `row`, `source` and `reason`. Those of `X_val` follow: their `argument` is `"X_val"`, and
        their row is one of `X_val`. Predictions do not change it.
    interrupted_ : bool
        Whether the fit was interrupted from the keyboard.
    net_ : skorch.NeuralNet
        Trained blocks and head; it takes activations at the last boundary.
    history_ : skorch.history.History
        Metrics of every epoch.
    preprocessing_ : Preprocessing
        How images are resized, cropped and normalized; it comes with the weights.
    pixel_range_ : (float, float) or None
        Values of black and white in images that are not 8-bit; `None` if the data needed none.
    batch_norm_ : BatchNormState or None
        Statistics that `batch_norm="adapt"` estimated, on the target if there is one.
    n_features_in_ : int
        Number of columns seen in `fit` if `X` was 2-D.
    feature_names_in_ : ndarray of str
        Column names seen in `fit` if `X` had them.

    See Also
    --------
    PretrainedFeatureExtractor : Compute embeddings for any other classifier.
    AugmentationDisplay : Show the augmented views.

    Notes
    -----
    Fitting the head first follows Kumar et al., "Fine-Tuning can Distort Pretrained Features and
    Underperform Out-of-Distribution", ICLR 2022. If some class has fewer than 10 training images,
    weight decay is 0.1 by default.

    A head that fits all training images leaves no loss from which blocks could learn. So when the
    first blocks begin to train, the logits of the fitted head are multiplied by 0.3.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTunedImageClassifier
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> classifier = FineTunedImageClassifier(
    ...     image_shape=(8, 8), image_size=32, augment="light", n_views=1, max_epochs=2,
    ...     random_state=0,
    ... )
    >>> classifier.fit(X[:60], y[:60]).score(X[60:90], y[60:90]) > 0.9
    True
    >>> [stage["stage"] for stage in classifier.stages_]
    ['head', 'all']
    """

    _task: ClassificationTask

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        unfreeze: Any = "auto",
        max_epochs: int | str = "auto",
        lr: float | str = "auto",
        lr_drop: float = 10.0,
        lr_decay: float = 1.0,
        optimizer: Any = "adam",
        weight_decay: Any = "auto",
        batch_size: int = 8,
        batch_norm: str = "frozen",
        augment: Any = "auto",
        n_views: int | str | None = "auto",
        dropout: float = 0.2,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        averaging: float | str = "auto",
        class_weight: Any = None,
        validation_fraction: float = 0.1,
        early_stopping: bool | str = "auto",
        n_iter_no_change: int = 5,
        checkpoint_dir: Any = None,
        domain_adversarial: float = 0.0,
        image_size: Any = "auto",
        image_shape: Any = None,
        pixel_range: Any = "auto",
        background: Any = "white",
        device: Any = "auto",
        engine: str = "auto",
        precision: str = "auto",
        n_jobs: int | None = None,
        cache: Any = "auto",
        on_error: str = "raise",
        callbacks: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.unfreeze = unfreeze
        self.max_epochs = max_epochs
        self.lr = lr
        self.lr_drop = lr_drop
        self.lr_decay = lr_decay
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.batch_norm = batch_norm
        self.augment = augment
        self.n_views = n_views
        self.dropout = dropout
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.averaging = averaging
        self.class_weight = class_weight
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.checkpoint_dir = checkpoint_dir
        self.domain_adversarial = domain_adversarial
        self.image_size = image_size
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.background = background
        self.device = device
        self.engine = engine
        self.precision = precision
        self.n_jobs = n_jobs
        self.cache = cache
        self.on_error = on_error
        self.callbacks = callbacks
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks
    def fit(
        self,
        X: Any,
        y: Any,
        *,
        sample_weight: Any = None,
        sample_domain: Any = None,
        X_val: Any = None,
        y_val: Any = None,
    ) -> FineTunedImageClassifier:
        """Train the classifier.

        Parameters
        ----------
        X : images in any container that `PretrainedFeatureExtractor` takes
        y : array-like of shape (N,)
            Class labels: numbers, strings or booleans. Only labels of a target domain may be
            missing.
        sample_weight : array-like of shape (N,), default=None
            Weight of each image. A weight of 0 leaves the image out; all other images of a target
            domain count the same.
        sample_domain : array-like of shape (N,), int, default=None
            Domain of each image, in skada's convention: positive for the source, whose labels are
            learned; negative for the target, for which the values of `y` are ignored.
            `domain_adversarial` and `batch_norm="adapt"` use the images of the target.
        X_val, y_val : images and their labels, default=None
            Validation images, from the source if there are two domains. No images of `X` are held
            out then.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            If parameters, images, labels or domains are invalid, or if labels are missing; before
            training starts.
        ImageError
            If images cannot be read and `on_error="raise"`. All others are embedded first, and
            their embeddings stay in the store. The error names the first ten rows and files, and
            its `errors` are all.
        FloatingPointError
            If the loss is not finite and, without validation images, there are no earlier weights
            to restore.
        """
        return self._fit(FitData(X, y, sample_weight, sample_domain, X_val, y_val))

    def _encode(
        self, images: Images, y: Any, sample_weight: Any, sample_domain: Any
    ) -> tuple[EncodedLabels, ClassificationTask]:
        labels = check_labels(
            images,
            y,
            sample_weight,
            self.class_weight,
            estimator=type(self).__name__,
            sample_domain=sample_domain,
        )
        self.classes_ = labels.classes
        return labels, ClassificationTask(labels.classes)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each image.

        Returns
        -------
        ndarray of shape (N,)
            Values of `classes_`.

        Raises
        ------
        ImageError
            If images cannot be read, whatever `on_error` is; names all of them. To predict the
            others, leave out the rows of NaN that `predict_proba` returns with `on_error="skip"`.
        """
        outputs = self._outputs(X)
        return self._task.predict(outputs)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class.

        Returns
        -------
        ndarray of shape (N, K)
            float32; columns in the order of `classes_`. With `on_error="skip"`, the rows of images
            that cannot be read are NaN.
        """
        outputs = self._outputs(X, self.on_error)
        return self._task.predict_proba(outputs)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits.

        Returns
        -------
        ndarray of shape (N, K), or (N,) for two classes
            float32; for two classes, the log-odds of the second one. With `on_error="skip"`, the
            rows of images that cannot be read are NaN.
        """
        outputs = self._outputs(X, self.on_error)
        return self._task.decision_function(outputs)

    def to_module(self, output: str = "probabilities") -> ImageModule:
        """Return the fitted classifier as one torch module, from images to probabilities.

        Parameters
        ----------
        output : {"probabilities", "logits", "embeddings"}, default="probabilities"
            What the module computes: the results of `predict_proba`, logits, or the results of
            `transform`.

        Returns
        -------
        nn.Module
            Maps images, uint8 (N, 3, height, width) of any one size, to probabilities (N, K),
            float32. It is a copy, frozen, on the CPU, and computes in float32. Its attribute
            `classes` is `classes_`.

        See Also
        --------
        to_module : The same for pipelines and `SelfTrainedImageClassifier`.
        """
        check_is_fitted(self)
        check_choice("output", output, ["probabilities", "logits", "embeddings"])
        *network, head = self._modules()
        if output == "embeddings":
            return ImageModule(self.preprocessing_, *network)
        last = [nn.Softmax(dim=1)] if output == "probabilities" else []
        return ImageModule(self.preprocessing_, *network, head, *last, classes=self.classes_)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on images and their labels, 0-1; labels must not be missing.

        Raises
        ------
        ImageError
            If images cannot be read and `on_error="raise"`, or if no image can be read.
        """
        y = check_not_missing(y)
        if self.on_error == "raise":
            return super().score(X, y, sample_weight)
        check_one_per_image("y", y, X)
        outputs = self._outputs(X, self.on_error)
        readable = np.flatnonzero(~np.isnan(outputs).any(axis=1))
        if not len(readable):
            self.predict(X)  # raises an error that names the images
        if sample_weight is not None:
            sample_weight = np.asarray(sample_weight)[readable]
        predicted = self._task.predict(outputs[readable])
        return float(accuracy_score(y[readable], predicted, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
