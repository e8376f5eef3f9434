from .batches import num_classes_of, random_batch, random_image

__all__ = ['num_classes_of', 'random_batch', 'random_image']
