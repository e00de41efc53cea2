"""Fine-tuning of pretrained generators, through PEFT and diffusers; needs the extra ``finetune``."""
