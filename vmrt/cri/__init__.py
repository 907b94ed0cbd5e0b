"""The gRPC edge: protobuf in, specs out. The only room that knows grpc."""
