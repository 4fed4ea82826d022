// Package trace records what the processes of cgroups need of files, from the page cache's own view: which pages, in order of
// first need, through read and mmap, exec and sendfile, and through overlayfs and EROFS as well as without them.
//
// There are two methods; New finds out which one the host allows.
//
//   - eBPF on the tracepoints of the page cache (package internal/bpf). Everything that is read from disk is seen, with the
//     kernel's own read-ahead; since Linux 6.10 also what is found in memory. A process counts as in a cgroup if it is in it, or up
//     to three levels below it; of cgroups below one another that are recorded at once, the lowest gets it. Events that come faster
//     than they are read are lost, and counted.
//     Files on tmpfs are always in memory, and reads of them are not seen.
//   - fanotify, where eBPF is refused: which files are opened, in order; and when the recording is ready and when it ends, which of
//     their pages are in memory. So of a file that others use too, more may be told than the cgroup needed. It sees opens on
//     the file systems of the roots, and on overlays of them that this mount namespace has. An open by whomever that cannot be looked
//     at, because the file or the process is gone, counts as lost.
//
// A recording takes a bounded amount of memory, whatever the recorded do: what is beyond that is counted as lost too. Programs
// are attached, and marks are there, only while something is recorded, and they end with the process at the latest.
package trace
