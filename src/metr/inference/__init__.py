"""From the network's answer to detections."""
