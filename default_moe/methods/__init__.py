"""Ways to train a router, chosen by `moe.router`. A new one takes its own file, and a line here."""

from default_moe.methods.default import DefaultMoE
from default_moe.methods.dense import Dense
from default_moe.methods.densemixer import DenseMixer
from default_moe.methods.loss_free import LossFree
from default_moe.methods.method import Decision as Decision
from default_moe.methods.method import Load as Load
from default_moe.methods.method import Method as Method
from default_moe.methods.remoe import ReMoE
from default_moe.methods.sparsemixer import SparseMixer
from default_moe.methods.topk import TopK

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        TopK,
        DefaultMoE,
        Dense,
        DenseMixer,
        SparseMixer,
        ReMoE,
        LossFree,
    )
}
