from .denoiser import PipelineDenoiser as PipelineDenoiser
from .denoiser import load_pipeline as load_pipeline
from .export import export_pipeline as export_pipeline
from .lora import add_lora as add_lora
from .lora import load_lora as load_lora
from .lora import save_lora as save_lora
from .unconditional import import_pipeline as import_pipeline
