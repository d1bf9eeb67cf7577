"""The agent beside the containers: attests, fetches keys and images, runs containers, does nothing its policy does not allow."""
