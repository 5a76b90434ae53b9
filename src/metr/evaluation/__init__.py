"""The COCO protocol, and what one joint detector does to each dataset."""
