/* hypercall: XENVER_version, and XENVER_extraversion with a buffer, through privcmd. */
#include <stdio.h>
#include <xencall.h>
#include <xen/xen.h>
#include <xen/version.h>

int main(void)
{
	xencall_handle *xcall = xencall_open(NULL, 0);
	if (!xcall) {
		perror("open");
		return 1;
	}
	int version = xencall2(xcall, __HYPERVISOR_xen_version, XENVER_version, 0);
	if (version < 0) {
		perror("version");
		return 1;
	}
	xen_extraversion_t *extra = xencall_alloc_buffer(xcall, sizeof(*extra));
	if (!extra) {
		perror("buffer");
		return 1;
	}
	if (xencall2(xcall, __HYPERVISOR_xen_version, XENVER_extraversion, (unsigned long)extra) < 0) {
		perror("extraversion");
		return 1;
	}
	printf("Xen %d.%d%s\n", version >> 16, version & 0xffff, *extra);
	return xencall_close(xcall);
}
