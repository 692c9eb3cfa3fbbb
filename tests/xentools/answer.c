/* answer DOMID N: offer a port to that domain, print it; N times wait for an event and notify back. */
#include <stdio.h>
#include <stdlib.h>
#include <xenevtchn.h>

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	xenevtchn_handle *xce = xenevtchn_open(NULL, 0);
	if (!xce) {
		perror("open");
		return 1;
	}
	xenevtchn_port_or_error_t port = xenevtchn_bind_unbound_port(xce, atoi(argv[1]));
	if (port < 0) {
		perror("bind");
		return 1;
	}
	printf("port %d\n", port);
	fflush(stdout);
	for (int i = atoi(argv[2]); i > 0; i--) {
		xenevtchn_port_or_error_t got = xenevtchn_pending(xce);
		if (got != port || xenevtchn_unmask(xce, port) < 0 || xenevtchn_notify(xce, port) < 0) {
			printf("pending: %d\n", got);
			return 1;
		}
	}
	if (system("cat /proc/interrupts"))
		return 1;
	return xenevtchn_close(xce) != 0;
}
