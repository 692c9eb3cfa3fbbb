#!/pvirq/busybox sh
# Domain 0 of the real Xen, as /etc/rc of its initrd. Takes commands over Xen's console and sends back what they print.
#
# Xen keeps no more than 128 characters for domain 0 to read, so a command comes in pieces, base64 of no more than 90
# characters, and each is answered before the next is sent:
#   "+ PIECE"    add to the command;  answer "\036+\n"
#   "! NONCE"    run it;              answer "\036NONCE begin\n", its output, "\036NONCE end STATUS\n"
# The hypervisor's own lines, "(XEN) ...", may come in between.

mkdir -p /run/lock /run/xen /run/xenstored /var/lib/xen /var/lib/xenstored /var/log/xen/console /dev/pts /dev/shm
rm -rf /var/run /var/lock
ln -s /run /var/run
ln -s /run/lock /var/lock
/pvirq/busybox mount -t devpts devpts /dev/pts
/pvirq/busybox mount -t xenfs xenfs /proc/xen
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
echo 1 > /proc/sys/kernel/printk

/pvirq/busybox stty raw -echo
command=
printf '\036ready\n'
while read -r kind text; do
	case $kind in
	+)
		command=$command$text
		printf '\036+\n'
		;;
	!)
		printf '\036%s begin\n' "$text"
		echo "$command" | base64 -d > /run/command
		command=
		(exec sh /run/command < /dev/null 2>&1)
		printf '\036%s end %s\n' "$text" $?
		;;
	esac
done
