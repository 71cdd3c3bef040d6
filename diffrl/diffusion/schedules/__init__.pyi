from .base import Schedule as Schedule
from .ddpm import DDPM as DDPM
from .edm import EDM as EDM
from .flow import Flow as Flow
from .registry import PROCESSES as PROCESSES
from .vp import VP as VP
