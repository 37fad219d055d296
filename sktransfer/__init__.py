"""Transfer learning for images that behaves like scikit-learn.

A backbone is an ordered list of blocks, and one boundary moves. What lies before it is frozen: it
runs through the fastest engine of the machine, and each picture goes through it once. The rooms, of
which each imports only from those above it:

images (decoding, items, containers, validation)
    anything image-like -> a lazy sequence of uint8 pictures
datasets
    folders of pictures -> paths and labels
transforms, reading
    pictures -> batches of pixels, prepared as the weights expect
architectures (anatomy, efficientnet_lite), split
    networks as ordered blocks; the boundary and what is frozen before it
weights, backbones, catalogue
    backbones by name, with their weights, preprocessing and digest
domain
    BatchNorm statistics of another domain
engines
    what runs the frozen blocks
store (database, space, session)
    picture -> embedding, shared by processes
features
    the one road: pictures -> embeddings, through store and engine
extractor
    PretrainedFeatureExtractor
demo, cli
    the command line
"""

from sktransfer._errors import PictureError, WeightsNotFoundError
from sktransfer._version import __version__
from sktransfer.catalogue import list_backbones
from sktransfer.datasets import load_image_folder
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.session import session_store
from sktransfer.store import EmbeddingStore
from sktransfer.transforms import Preprocessing

__all__ = [
    "EmbeddingStore",
    "PictureError",
    "Preprocessing",
    "PretrainedFeatureExtractor",
    "WeightsNotFoundError",
    "__version__",
    "list_backbones",
    "load_image_folder",
    "session_store",
]
