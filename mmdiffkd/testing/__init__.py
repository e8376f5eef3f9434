from .batches import num_classes_of, random_batch, random_image, random_items
from .models import fit_to, without_pretrained

__all__ = ['fit_to', 'num_classes_of', 'random_batch', 'random_image', 'random_items', 'without_pretrained']
