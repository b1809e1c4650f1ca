"""Pictures of measurements: PNG, or one HTML page with the picture and the table in it.

Needs matplotlib (``pip install accelrt[bench]``), which is imported only when something is drawn. What is drawn
comes as plain data, so that figures kept as JSON can be drawn again.
"""
