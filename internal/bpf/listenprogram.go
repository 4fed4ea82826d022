package bpf

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// A record as the program writes it, in the byte order of the machine: network namespace, port, address family, and the
// address in network order (of IPv4, the first four bytes).
const (
	recordNetns  = 0
	recordPort   = 4
	recordFamily = 6
	recordAddr   = 8
	recordBytes  = 24
)

const (
	familyIPv4 = 2
	familyIPv6 = 10
	tcpListen  = 10
)

// listen is a record, decoded.
type listen struct {
	at      place
	address netip.Addr
}

// decode reads one record. The kernel may hand over more bytes than were written, never fewer.
func decode(b []byte) (listen, error) {
	if len(b) < recordBytes {
		return listen{}, fmt.Errorf("%w: %d bytes", errRecord, len(b))
	}
	l := listen{at: place{
		netns: binary.NativeEndian.Uint32(b[recordNetns:]),
		port:  binary.NativeEndian.Uint16(b[recordPort:]),
	}}
	switch family := binary.NativeEndian.Uint16(b[recordFamily:]); family {
	case familyIPv4:
		l.address = netip.AddrFrom4([4]byte(b[recordAddr : recordAddr+4]))
	case familyIPv6:
		l.address = netip.AddrFrom16([16]byte(b[recordAddr : recordAddr+16])).Unmap()
	default:
		return listen{}, fmt.Errorf("%w: address family %d", errRecord, family)
	}
	return l, nil
}

// fields are the places of what the program reads, in bytes from the beginning of struct sock, and of inum in struct net.
type fields struct {
	family, port, addr4, addr6, net int32
	inum                            int32
}

// kernelFields looks the places up in the running kernel's BTF.
func kernelFields() (fields, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return fields{}, err
	}
	var f fields
	err = locate(spec, []field{
		{"sock_common", []string{"skc_family"}, &f.family},
		{"sock_common", []string{"skc_num"}, &f.port},
		{"sock_common", []string{"skc_rcv_saddr"}, &f.addr4},
		{"sock_common", []string{"skc_v6_rcv_saddr"}, &f.addr6},
		{"sock_common", []string{"skc_net", "net"}, &f.net},
		{"net", []string{"ns", "inum"}, &f.inum},
	})
	return f, err
}

// listenProgram is called for every change of state of every TCP socket of the host, with the socket, its old and its new
// state. It leaves after two instructions unless the new state is LISTEN.
func listenProgram(ring int, f fields) asm.Instructions {
	const record = -recordBytes // of the frame pointer
	const pointer = record - 8
	p := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 16, asm.DWord), // the new state
		asm.JNE.Imm32(asm.R6, tcpListen, "exit"),
		asm.LoadMem(asm.R7, asm.R1, 0, asm.DWord), // the socket
		asm.Mov.Imm(asm.R0, 0),
	}
	for off := int16(pointer); off < 0; off += 8 {
		p = append(p, asm.StoreMem(asm.RFP, off, asm.R0, asm.DWord))
	}
	p = append(p, readKernel(record+recordPort, 2, asm.R7, f.port)...)
	p = append(p, readKernel(record+recordFamily, 2, asm.R7, f.family)...)
	p = append(p, readKernel(pointer, 8, asm.R7, f.net)...)
	p = append(p, asm.LoadMem(asm.R8, asm.RFP, pointer, asm.DWord))
	p = append(p, readKernel(record+recordNetns, 4, asm.R8, f.inum)...)
	p = append(p,
		asm.LoadMem(asm.R8, asm.RFP, record+recordFamily, asm.Half),
		asm.JEq.Imm(asm.R8, familyIPv6, "ipv6"))
	p = append(p, readKernel(record+recordAddr, 4, asm.R7, f.addr4)...)
	p = append(p, asm.Ja.Label("send"))
	v6 := readKernel(record+recordAddr, 16, asm.R7, f.addr6)
	v6[0] = v6[0].WithSymbol("ipv6")
	p = append(p, v6...)
	return append(p,
		asm.LoadMapPtr(asm.R1, ring).WithSymbol("send"),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, record),
		asm.Mov.Imm(asm.R3, recordBytes),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("exit"),
		asm.Return(),
	)
}
