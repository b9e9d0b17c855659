"""How good the system is: exams, their judges, reports."""
