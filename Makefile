stubs: vmrt/agent/agent_pb2.py
vmrt/agent/agent_pb2.py: proto/agent.proto
	.venv/bin/python -m grpc_tools.protoc -Ivmrt/agent=proto --python_out=. --plugin=.venv/bin/protoc-gen-mypy --mypy_out=. vmrt/agent/agent.proto
