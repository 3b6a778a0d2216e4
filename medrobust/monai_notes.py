"""Without what MONAI says, each time an image loader is made, of a GPU reader of DICOM that nobody asked for.

It says so where pydicom is installed and NVIDIA's decoder is not. Imported for its effect.
"""

import logging
import warnings

logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader", category=UserWarning)
