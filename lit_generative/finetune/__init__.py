"""Fine-tuning of pretrained generators; what goes through PEFT and transformers needs the extra ``finetune``."""
