package disk

// DieForTest leaves all of a disk behind but what a process loses when it is killed.
func (d *Disk) DieForTest() error {
	err := d.server.cmd.Process.Kill()
	_ = d.server.cmd.Wait() // it was killed
	if err != nil {
		return err
	}
	return d.lock.Close()
}
