"""LoRAs passed on: the model card beside a file, and uploads to the Hugging Face Hub. Only uploads
import `huggingface_hub`."""
