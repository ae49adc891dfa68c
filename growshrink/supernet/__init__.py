"""Training a net inside the family of wider nets that share its weights (NetAug), and the ways out of it."""

from growshrink.supernet._route import route as route
from growshrink.supernet.choose import WidthChoice as WidthChoice
from growshrink.supernet.choose import choose_width as choose_width
from growshrink.supernet.choose import default_candidates as default_candidates
from growshrink.supernet.files import load_supernet as load_supernet
from growshrink.supernet.files import save_supernet as save_supernet
from growshrink.supernet.sort import sort_channels as sort_channels
from growshrink.supernet.task import NetAugTask as NetAugTask
