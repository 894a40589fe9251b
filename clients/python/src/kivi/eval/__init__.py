# SPDX-License-Identifier: Apache-2.0
"""What a codec costs a model, measured through the service: python -m kivi.eval --help."""
