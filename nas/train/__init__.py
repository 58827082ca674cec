"""Floor 2: teachers, cached targets, distillation of students, evaluation."""
