"""The guest agent: PID 1 of every VM. Imports the standard library, protobuf and vmrt.agent only."""
