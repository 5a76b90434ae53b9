"""From the network's output to detections."""
