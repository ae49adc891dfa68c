"""Data sets, and the batches they are fed in."""

from growshrink.data.batches import NO_AUGMENT as NO_AUGMENT
from growshrink.data.batches import Augment as Augment
from growshrink.data.batches import Batch as Batch
from growshrink.data.batches import TrainBatches as TrainBatches
from growshrink.data.batches import eval_batches as eval_batches
from growshrink.data.datasets import DataSet as DataSet
from growshrink.data.datasets import Split as Split
from growshrink.data.datasets import load_data as load_data
from growshrink.data.feed import Feed as Feed
from growshrink.data.feed import MemoryFeed as MemoryFeed
from growshrink.data.stream import StreamedData as StreamedData
from growshrink.data.stream import stream_data as stream_data
