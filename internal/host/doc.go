// Package host reads and clears what deployments have in the running system beside their processes: mounts, cgroups of either
// version, subnets, memory. It decides nothing: who calls it says which of them are his.
package host
