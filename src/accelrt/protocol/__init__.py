"""What both ends of an Open Inference Protocol connection mean by the same bytes.

Shared by a server's front end and by the backend that is its client, so that they cannot drift apart. `datatypes` has
the names of data types and raw tensors; `wire` the messages that carry tensors, without protobuf, so that a tensor is
copied as seldom as can be; `messages` all others, with protobuf; `faults` how errors travel.
"""
