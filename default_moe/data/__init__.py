"""Text as batches: `open_data` gives a run's tokenizer and the rows of its two splits.

corpus.py, stdlib.py, text_files.py, tfds_text.py give documents; tokenizer.py makes them ids; token_store.py keeps the
ids on the disk, sealed.py and sources.py what is known of them; packing.py cuts them into rows; pipeline.py puts these
together, held_out_sets.py adds more text to evaluate; prefetch.py works ahead.
"""

from default_moe.data.held_out_sets import HeldOutSet, open_sets
from default_moe.data.packing import Batch, Rows
from default_moe.data.pipeline import Data, data_directory, measure_reading, open_data
from default_moe.data.prefetch import prefetched
from default_moe.data.tokenizer import Tokenizer, tokenizer_fingerprint, tokenizer_from_dict

__all__ = [
    "Batch",
    "Data",
    "HeldOutSet",
    "Rows",
    "Tokenizer",
    "data_directory",
    "measure_reading",
    "open_data",
    "open_sets",
    "prefetched",
    "tokenizer_fingerprint",
    "tokenizer_from_dict",
]
