"""Ways to train a router, chosen by `moe.router`. A new one takes its own file, and the line here that imports it."""

from default_moe.methods.balancers import BALANCERS as BALANCERS
from default_moe.methods.balancers import Balancer as Balancer
from default_moe.methods.balancers import NoBalancer as NoBalancer
from default_moe.methods.decision import Decision as Decision
from default_moe.methods.decision import Load as Load
from default_moe.methods.decision import RouterInputs as RouterInputs
from default_moe.methods.decision import choose as choose
from default_moe.methods.decision import decide as decide
from default_moe.methods.decision import largest as largest
from default_moe.methods.decision import scores as scores
from default_moe.methods.default import DefaultMoE as DefaultMoE
from default_moe.methods.dense import Dense as Dense
from default_moe.methods.densemixer import DenseMixer as DenseMixer
from default_moe.methods.expert_threshold import DefaultThreshold as DefaultThreshold
from default_moe.methods.expert_threshold import ExpertThreshold as ExpertThreshold
from default_moe.methods.frozen import Frozen as Frozen
from default_moe.methods.hash import Hash as Hash
from default_moe.methods.loss_free import LossFree as LossFree
from default_moe.methods.method import METHODS as METHODS
from default_moe.methods.method import Method as Method
from default_moe.methods.method import groups_of_settings as groups_of_settings
from default_moe.methods.probmoe import ProbMoE as ProbMoE
from default_moe.methods.remoe import ReMoE as ReMoE
from default_moe.methods.sparsemixer import SparseMixer as SparseMixer
from default_moe.methods.topk import TopK as TopK
