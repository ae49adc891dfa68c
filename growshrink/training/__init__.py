"""Training: data, batches."""

from growshrink.training.batches import NO_AUGMENT as NO_AUGMENT
from growshrink.training.batches import Augment as Augment
from growshrink.training.batches import Batch as Batch
from growshrink.training.batches import TrainBatches as TrainBatches
from growshrink.training.batches import eval_batches as eval_batches
from growshrink.training.data import DataSet as DataSet
from growshrink.training.data import Split as Split
from growshrink.training.data import load_data as load_data
from growshrink.training.stream import StreamedData as StreamedData
from growshrink.training.stream import stream_data as stream_data
