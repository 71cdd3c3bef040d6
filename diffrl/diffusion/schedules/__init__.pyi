from .all import DDPM as DDPM
from .all import EDM as EDM
from .all import PROCESSES as PROCESSES
from .all import VP as VP
from .all import Flow as Flow
from .all import Schedule as Schedule
