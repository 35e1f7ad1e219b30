"""A model as a service: many clients, one engine."""

from transfusion_pytorch.serving.async_engine import AsyncEngine, EngineClosed, EventStream

__all__ = ["AsyncEngine", "EngineClosed", "EventStream"]
