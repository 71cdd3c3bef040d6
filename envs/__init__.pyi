from .gymnasium_mdp import DiffusionMDPEnv as DiffusionMDPEnv
from .gymnasium_mdp import DiffusionMDPVectorEnv as DiffusionMDPVectorEnv
from .gymnasium_mrp import DiffusionMRPEnv as DiffusionMRPEnv
from .gymnasium_mrp import DiffusionMRPVectorEnv as DiffusionMRPVectorEnv
from .mdp import DiffusionMDP as DiffusionMDP
from .mrp import DiffusionMRP as DiffusionMRP
from .sb3 import sb3_vec_env as sb3_vec_env
