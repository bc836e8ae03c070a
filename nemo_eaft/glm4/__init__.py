"""GLM-4-0414, the dense models (Hugging Face `Glm4ForCausalLM`), for NeMo 2.x and Megatron-Core.

NeMo 2.7.3 has ChatGLM2 and 3 only. A layer differs from Llama's in two norms more, on what attention and MLP add to the
residual (`layer.py`), and in a rotary embedding of half of each head, over pairs of neighbours. Importing this folder
registers the Hugging Face importer and exporter, so that NeMo's own `llm.import_ckpt`, `llm.finetune` and
`llm.export_ckpt` work. It needs nothing of the rest of nemo_eaft, but a checkpoint of these models loads only where
nemo_eaft is installed: the model class lives here.
"""

from nemo_eaft.glm4.hugging_face import HFGLM4Exporter, HFGLM4Importer
from nemo_eaft.glm4.model import GLM4Config, GLM4Config9B, GLM4Config32B, GLM4Model

__all__ = ["GLM4Config", "GLM4Config9B", "GLM4Config32B", "GLM4Model", "HFGLM4Exporter", "HFGLM4Importer"]
