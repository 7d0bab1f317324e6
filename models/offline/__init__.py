"""Capture a teacher's answers to the data once, train on them many times without its body."""

from models.offline.capture import CaptureSettings, capture
from models.offline.teacher import OfflineTeacher, is_offline, open_offline_teacher

__all__ = ["CaptureSettings", "OfflineTeacher", "capture", "is_offline", "open_offline_teacher"]
