//! RabbitMQ, in the wire format of oslo.messaging.
