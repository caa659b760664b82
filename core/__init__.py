"""What the API and the workers share: values, policy, the queue, the store. Never imports torch."""
