"""The life of a confidential container: sandbox, virtual machine, agent, container."""
