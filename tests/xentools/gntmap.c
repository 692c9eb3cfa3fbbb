/* gntmap DOMID REF TEXT: map that domain's page (gntdev), print what is in it, write TEXT into its second half. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xengnttab.h>

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	xengnttab_handle *xgt = xengnttab_open(NULL, 0);
	if (!xgt) {
		perror("open");
		return 1;
	}
	char *page = xengnttab_map_grant_ref(xgt, atoi(argv[1]), atoi(argv[2]), PROT_READ | PROT_WRITE);
	if (!page) {
		perror("map");
		return 1;
	}
	printf("read %s\n", page);
	strcpy(page + 2049, argv[3] + 1);
	((volatile char *)page)[2048] = argv[3][0]; /* last: the sharer waits for it */
	if (xengnttab_unmap(xgt, page, 1)) {
		perror("unmap");
		return 1;
	}
	return 0;
}
