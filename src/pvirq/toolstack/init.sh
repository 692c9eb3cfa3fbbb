#!/pvirq/busybox sh
# The first process of a guest that pvirq gave its initrd, or an overlay over the user's own initrd (then started
# with rdinit=/pvirq/init). Written for busybox ash. A fork and exec is what costs here, not a builtin.
#
# The kernel hands "name=value" words of its command line to init as environment variables:
#   pvirq=agent   commands come in over the console, results go back (protocol below)
#   pvirq=shell   an interactive shell; pvirq_rows and pvirq_cols give the size of the terminal
#   otherwise     /etc/rc if there is one, else a banner and a shell
# When the agent is told to, or the shell or /etc/rc ends, the machine powers off.
#
# The agent's protocol, on a raw console. It says "\036pvirq ready\n"; then, per line "<nonce> <base64 of a shell
# command>": "\036<nonce> begin\n", the command's output as it is (stdout and stderr), "\036<nonce> end <status>\n",
# where a command killed by signal n has status 128+n. Output may lack a final newline before the 036. The lines
# "poweroff", "reboot" and "halt" end the machine.

bb=/pvirq/busybox
mode=$pvirq
unset pvirq
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# One fork for proc, sysfs and devtmpfs. Without devtmpfs the device nodes of the archive remain.
$bb mount -a -T /pvirq/fstab

# The archive has links for few applets: unpacking one costs the kernel some 60,000 instructions, and making it here
# 25,000 (measured), yet a busybox shell of the common kind finds its applets without. So the agent does without,
# unless the busybox is of the other kind.
if [ -f /pvirq/links ]; then
	read -r when < /pvirq/links
	if [ "$when" = always ] || [ "$mode" != agent ]; then
		$bb --install -s /bin
	fi
fi

# What a busybox's halt, poweroff and reboot send to the init that they take for granted; it comes to pass when the
# command that runs then has ended (so an interactive shell has aliases). And what the kernel runs when the toolstack
# asks; a missing /sbin/reboot it does without.
trap 'exec $bb halt -f' USR1
trap 'exec $bb poweroff -f' USR2
trap 'exec $bb reboot -f' TERM
[ -x /sbin/poweroff ] || echo /pvirq/poweroff > /proc/sys/kernel/poweroff_cmd

if [ -f /pvirq/modules ]; then
	while read -r module; do
		$bb insmod "$module"
	done < /pvirq/modules
fi

# A vCPU that the toolstack gives the guest back is there, but offline until somebody asks for it: udev elsewhere.
if read -r cpus 2> /dev/null < /sys/devices/system/cpu/possible && [ "$cpus" != 0 ]; then
	$bb uevent $bb sh /pvirq/hotplug > /dev/null 2>&1 < /dev/null &
fi

# The user's shell if the initrd has one, so that its own commands are found and not busybox's.
if [ -x /bin/sh ]; then
	sh=/bin/sh
else
	sh="$bb sh"
fi

agent() {
	echo 1 > /proc/sys/kernel/printk # emergencies only: printk must not get between the lines
	$bb stty raw -echo
	# This shell's own stderr goes nowhere: it would report "Killed" and the like amid the command's output. (Hence
	# also the subshell below, which is the one fork: redirections of a plain command hold in this shell meanwhile.)
	exec 3>&2 2> /dev/null
	printf '\036pvirq ready\n'
	while :; do
		while read -r nonce command; do
			case $nonce in
			poweroff | reboot | halt) exec $bb "$nonce" -f ;; # these call sync themselves
			'') continue ;;
			esac
			# A here-document, as a pipe would cost two more forks.
			command=$(
				exec $bb base64 -d <<-END
					$command
				END
			) || command="echo 'pvirq: not base64' >&2; exit 125"
			printf '\036%s begin\n' "$nonce"
			(exec $sh -c "$command" < /dev/null 2>&3 3>&-)
			printf '\036%s end %s\n' "$nonce" $?
		done
		$bb sleep 1 # end of file: the console was hung up; it may come back
		exec 0< /dev/console
	done
}

interactive() {
	echo 4 > /proc/sys/kernel/printk # errors and worse
	if [ "${pvirq_rows:-0}" -gt 0 ] && [ "${pvirq_cols:-0}" -gt 0 ]; then
		$bb stty rows "$pvirq_rows" cols "$pvirq_cols"
	fi
	unset pvirq_rows pvirq_cols
	export PS1='\w \$ ' ENV=/pvirq/shrc
	# /dev/console can't be a controlling terminal; cttyhack finds and opens the tty behind it.
	$bb setsid $bb cttyhack $sh
}

case $mode in
agent) agent ;;
shell) interactive ;;
*)
	if [ -x /etc/rc ]; then
		/etc/rc
	else
		read -r release < /proc/sys/kernel/osrelease
		echo "pvirq: Linux $release; when the shell ends, the machine powers off"
		interactive
	fi
	;;
esac
exec $bb poweroff -f
