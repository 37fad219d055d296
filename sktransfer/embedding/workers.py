"""The base class of estimators that worker processes load."""

from __future__ import annotations

from typing import Any, ClassVar

from sklearn.base import BaseEstimator

from sktransfer.data.pillow_settings import adopt_pillow_settings, share_pillow_settings
from sktransfer.store.session import share_session
from sktransfer.utils.pickling import check_other_programs_can_load


class SharedEstimator(BaseEstimator):
    """An estimator whose copies in worker processes use the store and settings of this process."""

    cache: Any

    _NOT_PICKLED: ClassVar[tuple[str, ...]] = ()
    """Attributes that are None in a pickle, and built again when they are needed."""

    def __getstate__(self) -> dict[str, Any]:
        check_other_programs_can_load(self.get_params(deep=False))
        if isinstance(self.cache, str) and self.cache == "auto":
            share_session()
        share_pillow_settings()
        state = super().__getstate__()
        return {**state, **{name: None for name in self._NOT_PICKLED if name in state}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        adopt_pillow_settings()
        super().__setstate__(state)
