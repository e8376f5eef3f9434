from .batches import num_classes_of, random_batch, random_image, random_items

__all__ = ['num_classes_of', 'random_batch', 'random_image', 'random_items']
