"""The endpoint for agents that others wrote: OpenAI's and Anthropic's HTTP APIs in front of episodes."""
