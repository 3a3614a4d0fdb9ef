"""Pascal-VOC data: parsing, caching, augmentation, batches, synthesis. Never imports nn."""
