"""Training: one loop, evaluation, calibration, distillation."""

from growshrink.training._evaluate import Score as Score
from growshrink.training._evaluate import evaluate as evaluate
from growshrink.training.calibrate import calibrate_bn as calibrate_bn
from growshrink.training.distil import TeacherNet as TeacherNet
from growshrink.training.gradient_maps import GradientMaps as GradientMaps
from growshrink.training.gradient_maps import compile_gradients as compile_gradients
from growshrink.training.sync import LambdaScheduler as LambdaScheduler
from growshrink.training.sync import branch_parameters as branch_parameters
from growshrink.training.sync import sync_optimizer as sync_optimizer
from growshrink.training.trainer import TrainConfig as TrainConfig
from growshrink.training.trainer import Trainer as Trainer
