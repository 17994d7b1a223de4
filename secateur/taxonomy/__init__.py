"""The survey's taxonomy: a record for every method, filters over records, and advice on choosing."""

from secateur.taxonomy.advice import recommend
from secateur.taxonomy.axes import MethodInfo, filter_records, record

__all__ = ["MethodInfo", "filter_records", "recommend", "record"]
