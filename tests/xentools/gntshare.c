/* gntshare DOMID [NOTIFY-PORT]: share a page with that domain (gntalloc), print its reference, write into it, wait until
 * the other side has written its own into the second half, print that. The page says how: see gntmap.c. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xengnttab.h>

int main(int argc, char **argv)
{
	uint32_t ref;

	if (argc < 2)
		return 2;
	xengntshr_handle *xgs = xengntshr_open(NULL, 0);
	if (!xgs) {
		perror("open");
		return 1;
	}
	volatile char *page = xengntshr_share_pages(xgs, atoi(argv[1]), 1, &ref, 1);
	if (!page) {
		perror("share");
		return 1;
	}
	strcpy((char *)page, "from the sharer");
	printf("ref %u\n", ref);
	fflush(stdout);
	while (!page[2048])
		usleep(10000);
	printf("read %s\n", (char *)page + 2048);
	fflush(stdout);
	return xengntshr_unshare(xgs, (void *)page, 1) != 0;
}
