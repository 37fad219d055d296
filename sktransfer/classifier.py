"""FineTunedImageClassifier: the boundary moves toward the input, stage by stage."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags

from sktransfer.data.images import Images
from sktransfer.data.labels import EncodedLabels, check_labels
from sktransfer.finetuning.estimator import FineTunedEstimator
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.utils.progress import CallbackSupport, with_callbacks


class FineTunedImageClassifier(CallbackSupport, ClassifierMixin, FineTunedEstimator):
    """Classify images with a pretrained network, unfrozen from the head on, stage by stage.

    Stage 0 solves a new head on cached embeddings. Every later stage moves the boundary toward the
    input: the blocks behind it are trained on cached activations of the images and of augmented
    copies, the blocks before it stay as they are, to the last bit.

    Parameters
    ----------
    backbone : str, torch.nn.Module, callable or classifier, default="efficientnet_lite0"
        A name of `list_backbones`, `"timm:NAME"` where timm is installed, a module of your own
        (it is copied, and left as it is), a callable that makes one, or a fitted
        `FineTunedImageClassifier`, which goes into a `sklearn.frozen.FrozenEstimator` where
        scikit-learn clones.
    weights : str, path or None, default="default"
        `"default"`, a name of torchvision's such as `"IMAGENET1K_V2"`, a `.safetensors` or `.pth`
        file, or `None` for random values: then all trained blocks learn at `lr`, and so do their
        BatchNorm statistics.
    unfreeze : int, str or sequence, default=(0, 2)
        What each stage trains besides the head: a number of blocks counted from the head, `"all"`,
        the name of a block or a list of names. 0, which can only come first, solves the head; in a
        fit without it the head starts at zero. `("all",)` is full fine-tuning from the start, and
        with `weights=None` training from scratch.
    max_epochs : int, default=6
        Epochs of each stage at most; an epoch shows each image once, in one of its views.
    lr : float, default=1e-3
        Highest learning rate of the head. Within a stage all rates rise for a tenth of the epochs,
        and then fall along a half cosine.
    lr_drop : float, default=10.0
        How much slower than the head the last block learns. Values below 10 raise a warning.
    lr_decay : float, default=2.6
        How much slower than the block after it each block learns, but the first trained block no
        more than 10 times slower than the last. Source: Howard and Ruder, "Universal Language
        Model Fine-tuning for Text Classification", 2018.
    optimizer : {"adam", "sgd"} or torch.optim.Optimizer class, default="adam"
        `"adam"` is the one with decoupled weight decay, `"sgd"` the one with Nesterov's momentum
        of 0.9.
    weight_decay : float or "auto", default="auto"
        `"auto"` is 0.01, and 0.1 where some class has fewer than 10 training images.
    batch_size : int, default=16
        Images of a training step.
    batch_norm : {"frozen", "adapt", "train"}, default="frozen"
        Statistics of BatchNorm: those of the weights in all blocks; estimated anew on the images
        given to `fit` (AdaBN); or, in the trained blocks only, learned. Where `sample_domain` tells
        two domains apart, `"adapt"` learns as `"frozen"` does, and then finds statistics under
        which the target looks to each layer as the source does. Weights of blocks before the
        boundary never change.
    augment : {"light", "standard", "aggressive", "industrial"}, callable or None, \
default="standard"
        How copies of the training images are made: see `AugmentationDisplay`. `"light"` mirrors
        nothing, for digits and text. A transform of torchvision or any other callable maps a
        image (3, H, W), uint8, to another one.
    n_views : int, "auto" or None, default="auto"
        Augmented copies of each training image, which are cached besides the image itself.
        `"auto"` is 3, and 7 with `augment="industrial"`, where much can be wrong with an image.
        `None` makes fresh ones in every epoch, which costs a pass of all images through the whole
        network each time.
    dropout : float, default=0.2
        Share of the penultimate vector that training drops.
    label_smoothing : float, default=0.0
        Share of each label that is spread over all classes.
    mixup : float, default=0.0
        Parameter of the Beta distribution by which pairs of images are mixed where they cross the
        boundary.
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, as everywhere in scikit-learn.
    validation_fraction : float, default=0.1
        Share of the images of each class that is held out to choose the head's regularization
        and the best epoch; not used where `X_val` is given, or without `early_stopping`.
    early_stopping : bool or "auto", default="auto"
        Ends a stage when the loss on the validation images has not improved for
        `n_iter_no_change` epochs, and goes back to the best weights, which may be those that the
        stage began with. `False` trains on all images for `max_epochs` epochs, and chooses the
        head's regularization by `X_val`, or else by cross-validation. `"auto"` is `True` where
        validation images are given, or there are at least 2,000 images: fewer can better be
        used for training. With `domain_adversarial` only given ones count: those of the source
        cannot judge the target.
    n_iter_no_change : int, default=5
        Epochs without improvement that end a stage.
    checkpoint_dir : path or None, default=None
        If the state of the fit is saved after every epoch. The same fit on the same data goes
        on from there, to the same result as if nothing had ended it; another fit has a file of its
        own.
    domain_adversarial : float, default=0.0
        Weight of the loss of an adversary that tells the images of two domains apart, while the
        trained blocks learn to make them alike (DANN): for labels in a source and none in the
        target, which `sample_domain` in `fit` tells apart. 0 trains on the source alone. Source:
        Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016.
    image_size : int, (int, int), "auto" or None, default="auto"
        As in `PretrainedFeatureExtractor`, whose default is `None`, however.
    image_shape, pixel_range, device, engine, precision, n_jobs, cache
        As in `PretrainedFeatureExtractor`.
    callbacks : list of skorch callbacks or None, default=None
        Called in every stage that trains blocks.
    random_state : int, RandomState or None, default=None
        Seed of split, order, dropout and mixup. The cached copies of an image do not depend on it,
        so that folds and candidates share them.
    verbose : int, default=0
        Shows a bar for each stage where it is not 0, but not inside a search. Callbacks of
        scikit-learn's own (`set_callbacks`) hear of stages and epochs too.

    Attributes
    ----------
    classes_ : ndarray of shape (K,)
        The labels, sorted.
    stages_ : list of dict
        What each stage was: trained blocks, boundary, number of trained parameters, epochs, the
        best of them, its loss and accuracy on the validation images, seconds, and the head's
        `C`.
    interrupted_ : bool
        Whether the fit was ended from the keyboard.
    net_ : skorch.NeuralNet
        Trained blocks and head; it takes activations at the last boundary.
    history_ : skorch.history.History
        Metrics of every epoch.
    preprocessing_ : Preprocessing
        How images are resized, cropped and normalized: it comes with the weights.
    pixel_range_ : (float, float) or None
        The range in use for arrays that are not uint8; `None` where the data needed none.
    batch_norm_ : BatchNormState or None
        The statistics that `batch_norm="adapt"` found, of the target where there is one.
    n_features_in_ : int
        Columns seen in `fit`, where `X` was 2-D.
    feature_names_in_ : ndarray of str
        Column names seen in `fit`, where `X` had them.

    See Also
    --------
    PretrainedFeatureExtractor : Embeddings for any other classifier.
    AugmentationDisplay : Shows the augmented copies.

    Notes
    -----
    Solving the head first follows Kumar et al., "Fine-Tuning can Distort Pretrained Features and
    Underperform Out-of-Distribution", ICLR 2022. A set with fewer than 10 training images in some
    class is regularized more by default: weight decay is 0.1, and the head's `C` at most 0.1.

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
    ['head', 'last 2 blocks']
    """

    _task: ClassificationTask

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        unfreeze: Any = (0, 2),
        max_epochs: int = 6,
        lr: float = 1e-3,
        lr_drop: float = 10.0,
        lr_decay: float = 2.6,
        optimizer: Any = "adam",
        weight_decay: Any = "auto",
        batch_size: int = 16,
        batch_norm: str = "frozen",
        augment: Any = "standard",
        n_views: int | str | None = "auto",
        dropout: float = 0.2,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        class_weight: Any = None,
        validation_fraction: float = 0.1,
        early_stopping: bool | str = "auto",
        n_iter_no_change: int = 5,
        checkpoint_dir: Any = None,
        domain_adversarial: float = 0.0,
        image_size: Any = "auto",
        image_shape: Any = None,
        pixel_range: Any = "auto",
        device: Any = "auto",
        engine: str = "auto",
        precision: str = "auto",
        n_jobs: int | None = None,
        cache: Any = "auto",
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
        self.class_weight = class_weight
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.checkpoint_dir = checkpoint_dir
        self.domain_adversarial = domain_adversarial
        self.image_size = image_size
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.device = device
        self.engine = engine
        self.precision = precision
        self.n_jobs = n_jobs
        self.cache = cache
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
            Class labels: numbers, strings or booleans.
        sample_weight : array-like of shape (N,), default=None
            How much each image counts. A weight of 0 leaves it out; images of a target domain
            all count the same otherwise.
        sample_domain : array-like of shape (N,), int, default=None
            Where each image comes from: a positive number is the source, whose labels are learned;
            a negative one the target, whose labels are never read, whatever `y` holds there. What
            the target is used for, `domain_adversarial` and `batch_norm="adapt"` say. This is
            skada's convention.
        X_val, y_val : images and their labels, default=None
            Validation images, of the source where there are two domains; then none of `X` is
            held out.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For parameters, images, labels or domains that cannot be used, before anything is
            trained.
        ImageError
            For an image that cannot be read; it names the row and the file.
        FloatingPointError
            Where the loss is not finite, and there are no validation images by which to go back.
        """
        return self._fit(X, y, sample_weight, sample_domain, X_val, y_val)

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
            Of `classes_`.
        """
        outputs = self._outputs(X)
        return self._task.predict(outputs)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class.

        Returns
        -------
        ndarray of shape (N, K)
            float32; columns in the order of `classes_`.
        """
        outputs = self._outputs(X)
        return self._task.predict_proba(outputs)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits.

        Returns
        -------
        ndarray of shape (N, K), or (N,) for two classes
            float32; for two classes, the log-odds of the second one.
        """
        outputs = self._outputs(X)
        return self._task.decision_function(outputs)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
