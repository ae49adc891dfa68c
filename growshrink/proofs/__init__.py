"""Proofs about nets: are two equal, does a transform keep the function, what does a net cost."""

from growshrink.proofs._compare import Comparison as Comparison
from growshrink.proofs._compare import Verification as Verification
from growshrink.proofs._compare import assert_equivalent as assert_equivalent
from growshrink.proofs._compare import compare as compare
from growshrink.proofs._compare import verify as verify
from growshrink.proofs._profile import Profile as Profile
from growshrink.proofs._profile import profile as profile
from growshrink.proofs._profile import training_macs as training_macs
from growshrink.proofs._profile import training_memory as training_memory
