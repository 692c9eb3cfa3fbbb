"""Event-channel protocols as models' threads run them: a function of Xen's or Linux's, a generator of the same name."""
