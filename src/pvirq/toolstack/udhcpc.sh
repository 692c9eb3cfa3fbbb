#!/bin/sh
# What busybox's udhcpc runs as its state changes; $1 says to what, the environment what the server told.
case $1 in
deconfig)
	ip addr flush dev "$interface"
	ip link set "$interface" up
	;;
bound | renew)
	ip addr replace "$ip/${mask:-24}" dev "$interface"
	[ -n "$router" ] && ip route replace default via "${router%% *}" dev "$interface"
	{
		[ -n "$domain" ] && echo "search $domain"
		for server in $dns; do
			echo "nameserver $server"
		done
	} >/etc/resolv.conf
	;;
esac
exit 0
